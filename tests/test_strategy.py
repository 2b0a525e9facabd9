"""What every strategy inherits: seeding, weighting, pooling, precision."""

import inspect
import pickle
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from lssl import Backbone, InputError, Segmenter, Strategy, ViewSampler
from lssl.checkpoint import read_checkpoint
from lssl.correspondence.matched_views import Matching
from lssl.data.source import DataSource
from lssl.datamodules.phantom import PhantomDataModule
from lssl.evaluation.evaluate import evaluate
from lssl.networks.teacher import Teacher
from lssl.strategies.anatomical_embedding import AnatomicalEmbedding, CoarseMap, FineMap
from lssl.strategies.anatomical_invariance import AnatomicalInvariance
from lssl.strategies.global_contrastive import GlobalContrastive, MoCo
from lssl.strategies.longitudinal_local import LongitudinalLocal
from lssl.strategies.masked_autoencoder import MaskedAutoencoder
from lssl.strategies.prior_guided_local import PriorGuidedLocal
from lssl.task import CHECKPOINT_FORMAT
from lssl.utils.errors import input_error
from lssl.utils.schedules import WarmupCosine


class Mean(Strategy):
    """Pulls the output's mean to one: the smallest strategy."""

    def terms(self, first, second, batch):
        return {"mean": (self.backbone(first.image, ["a"])["a"].mean() - 1) ** 2}


def make(network=None, size=8, **options):
    network = network or nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.ReLU())
    return Mean(Backbone(network, {"a": "1"}), views=ViewSampler(size), **options)


def test_embedding_survives_instance_norm(make_batch):
    """The mean over a whole view is 0 after instance norm, whatever the image; the embedding must tell them apart."""
    strategy = make()
    first, _ = strategy.views.centred(make_batch(2, (8, 8, 8), affine="unit"))
    features = strategy.backbone(first.image, ["a"])["a"]
    assert features.mean((2, 3, 4)).abs().max() < 1e-5
    embedding = strategy.embed(first)["a"]
    assert embedding.shape == (2, 8)
    assert (embedding[0] - embedding[1]).abs().max() > 0.05


def test_embedding_pools_over_the_foreground_only(make_batch):
    strategy = make()
    batch = make_batch(1, (8, 8, 8), affine="unit")
    batch.foreground[..., :4] = False
    first, _ = strategy.views.centred(batch)
    features = strategy.backbone(first.image, ["a"])["a"][..., 4:]
    expected = torch.cat([features.mean((2, 3, 4)), features.amax((2, 3, 4))], 1)
    torch.testing.assert_close(strategy.embed(first)["a"], expected, atol=1e-4, rtol=1e-4)


def test_draws_depend_on_seed_stage_and_step_alone(monkeypatch):
    monkeypatch.setattr(Strategy, "global_rank", 0)
    strategy = make()

    def draw(*key):
        strategy.seed(*key)
        return torch.rand(3, generator=strategy.generator).tolist()

    torch.manual_seed(1)
    one = draw("fit", 5)
    torch.rand(10)
    assert draw("fit", 5) == one
    others = [draw("fit", 6), draw("val", 5), draw("fit", 5, 1)]
    monkeypatch.setattr(Strategy, "global_rank", 1)
    others.append(draw("fit", 5))
    torch.manual_seed(2)
    others.append(draw("fit", 5))
    assert len({tuple(values) for values in [one, *others]}) == 6


def test_loss_is_the_weighted_sum(make_batch, monkeypatch):
    monkeypatch.setattr(Strategy, "global_rank", 0)
    strategy = make(loss_weights={"mean": 3.0})
    strategy.seed("fit", 0)
    loss, terms = strategy._step(make_batch(2, (10, 10, 10)))
    torch.testing.assert_close(loss, 3 * terms["mean"])
    strategy.loss_weights = {"meen": 1.0}
    with pytest.raises(InputError, match="Mean has no term 'meen'; it has mean"):
        strategy._step(make_batch(2, (10, 10, 10)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda image: image.mean(), r"terms gives a Tensor; give a dict"),
        (lambda image: {"mean": image.mean((1, 2, 3, 4))}, r"'mean' is a tensor \(2,\); give a scalar tensor"),
        (lambda image: {"mean": 0.5}, r"'mean' is a float; give a scalar tensor"),
        (lambda image: {"mean": image.mean()}, r"the terms mean have no gradient; is one detached\?"),
    ],
)
def test_terms_of_ones_own_that_cannot_be_learned_from_are_refused(given, words, make_batch, monkeypatch):
    """Each ended in a traceback of torch."""
    monkeypatch.setattr(Mean, "terms", lambda self, first, second, batch: given(first.image))
    monkeypatch.setattr(Mean, "global_step", 0)
    monkeypatch.setattr(Mean, "global_rank", 0)
    with pytest.raises(InputError, match=words):
        make().training_step(make_batch(2, (8, 8, 8), affine="unit"), 0)


def test_no_decay_on_biases_and_norms(monkeypatch):
    strategy = make(schedule=None)
    monkeypatch.setattr(Strategy, "trainer", None)
    decayed, free = strategy.configure_optimizers().param_groups
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(list(strategy.parameters()))


# --- one way to the terms ---------------------------------------------------------------------------------------------


def small_trainer(tmp_path, **options) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(default_root_dir=tmp_path, accelerator="cpu", num_sanity_val_steps=0, **{**quiet, **options})


def both() -> PhantomDataModule:
    return PhantomDataModule(subjects=6, visits=2, size=24, spacing=7.0, split=(0.5, 0.5, 0.0), batch_size=3)


def network() -> Backbone:
    layers = [
        nn.Conv3d(1, 6, 2, stride=2),
        nn.ReLU(),
        nn.Conv3d(6, 8, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose3d(8, 4, 4, 4),
    ]
    return Backbone(nn.Sequential(*layers), {"fine": "0", "deep": "2"})


NARROW = {"hidden": 8, "projection": 8}
STRATEGIES = {
    "AnatomicalEmbedding": lambda views: AnatomicalEmbedding(
        network(), FineMap("fine"), CoarseMap("deep"), hidden=8, embedding=4, views=views
    ),
    "AnatomicalInvariance": lambda views: AnatomicalInvariance(
        network(), "deep", "fine", Matching(other_subject=0.5), block=4, views=views, **NARROW
    ),
    "GlobalContrastive": lambda views: GlobalContrastive(
        network(), ["deep"], partial(MoCo, queue=8, **NARROW), views=views
    ),
    "LongitudinalLocal": lambda views: LongitudinalLocal(
        network(), ["deep"], ["fine"], orthogonal_taps=("fine", "fine"), views=views, **NARROW
    ),
    "MaskedAutoencoder": lambda views: MaskedAutoencoder(network(), block=4, views=views),
    "PriorGuidedLocal": lambda views: PriorGuidedLocal(network(), ["deep"], min_points=4, views=views, **NARROW),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_reports_and_validation_see_the_same_terms(name: str, tmp_path):
    """Views, masks and noise are drawn as in validation, by the strategy's own way of drawing views."""
    torch.manual_seed(0)
    strategy, data = STRATEGIES[name](ViewSampler(16, overlap=0.7)), both()
    trainer = small_trainer(tmp_path)
    trainer.validate(strategy, datamodule=data, verbose=False)
    logged = {key.removeprefix("val/"): value.item() for key, value in trainer.callback_metrics.items()}
    report = evaluate(strategy, data.val_dataloader())
    terms = {key.removeprefix("term/"): value for key, value in report.items() if key.startswith("term/")}
    assert set(terms) == {term for term in strategy.loss_weights if strategy.uses(term)}
    for term, value in terms.items():
        assert value == pytest.approx(logged[term], rel=1e-5, abs=1e-6), term


class Counting(Mean):
    """Counts its steps, with or without a teacher."""

    def __init__(self, backbone, teacher: bool = False, **common):
        super().__init__(backbone, **common)
        self.done = []
        if teacher:
            self.teacher = Teacher({"backbone": backbone})

    def on_step_end(self, progress):
        super().on_step_end(progress)
        self.done.append(progress)


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("schedule", [None, WarmupCosine])
def test_on_step_end_runs_after_every_optimizer_step(teacher, schedule, tmp_path):
    strategy = Counting(
        Backbone(nn.Sequential(nn.Conv3d(1, 2, 1)), {"a": "0"}), teacher, views=ViewSampler(16), schedule=schedule
    )
    small_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(strategy, datamodule=both())
    assert strategy.done == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_run_without_end_has_no_progress(tmp_path):
    strategy = Counting(Backbone(nn.Sequential(nn.Conv3d(1, 2, 1)), {"a": "0"}), views=ViewSampler(16), schedule=None)
    stop = EarlyStopping("train/loss", patience=0, check_on_train_epoch_end=True)
    small_trainer(tmp_path, max_epochs=-1, limit_val_batches=0, log_every_n_steps=1, callbacks=[stop]).fit(
        strategy, datamodule=both()
    )
    assert strategy.done
    assert set(strategy.done) == {0.0}


def test_means_since_the_last_log_are_kept_in_checkpoints(make_batch, monkeypatch):
    """Three steps of a log of four before an interruption: the log of the resumed run knows all four."""
    one, two = make(), make()
    one._since_log = {"match": (torch.tensor(3.0), 3)}
    checkpoint: dict = {}
    one.on_save_checkpoint(checkpoint)
    two.on_load_checkpoint(checkpoint)
    assert two._since_log == {"match": (torch.tensor(3.0), 3)}


def test_a_checkpoint_of_another_format_is_refused_in_one_sentence(tmp_path):
    old = {"lssl": {"version": "0.0.9", "config": "{}"}, "state_dict": {}}
    torch.save(old, tmp_path / "old.ckpt")
    for refuse in (lambda: make().on_load_checkpoint(old), lambda: read_checkpoint(tmp_path / "old.ckpt")):
        with pytest.raises(InputError, match=r"format 1 and this version of lssl reads format \d+; use lssl 0.0.9"):
            refuse()
    make().on_load_checkpoint({"lssl": {"format": CHECKPOINT_FORMAT}})


def test_a_source_that_knows_no_visits_is_refused_where_one_is_needed(tmp_path, monkeypatch):
    strategy = make()
    for data, words in ((None, "there is no datamodule"), (L.LightningDataModule(), "LightningDataModule has none")):
        monkeypatch.setattr(Strategy, "trainer", SimpleNamespace(datamodule=data))
        with pytest.raises(InputError, match=f"Mean needs a datamodule with a table of visits, but {words}"):
            strategy.data_source  # noqa: B018
    data = both()
    assert isinstance(data, DataSource)
    monkeypatch.setattr(Strategy, "trainer", SimpleNamespace(datamodule=data))
    assert strategy.data_source is data


def test_weights_of_a_term_are_merged_once(make_batch):
    class Two(Mean):
        LOSS_WEIGHTS: ClassVar = {"mean": 2.0, "size": 0.0}

    backbone = Backbone(nn.Sequential(nn.Conv3d(1, 4, 1)), {"a": "0"})
    strategy = Two(backbone, ViewSampler(8), loss_weights={"size": 0.5})
    assert strategy.loss_weights == {"mean": 2.0, "size": 0.5}
    assert Two.LOSS_WEIGHTS == {"mean": 2.0, "size": 0.0}
    strategy.declare_terms({"mean": 1.0, "size": 7.0})
    assert strategy.loss_weights == {"mean": 1.0, "size": 0.5}
    with pytest.raises(InputError, match="no term 'extent'; it has mean, size"):
        Two(backbone, ViewSampler(8), loss_weights={"extent": 1.0})


def test_a_bug_raised_while_a_mistake_is_handled_is_a_bug():
    def fail(error: Exception, by_cause: bool) -> InputError | None:
        try:
            try:
                raise InputError("what the user did")
            except InputError as mistake:
                if by_cause:
                    raise error from mistake
                raise error  # noqa: B904
        except type(error) as caught:
            return input_error(caught)

    assert fail(KeyError("bug"), by_cause=False) is None
    assert str(fail(KeyError("wrapped"), by_cause=True)) == "what the user did"


@pytest.mark.parametrize(
    "cls", [Segmenter, *(type(make(ViewSampler(16, overlap=0.7))) for make in STRATEGIES.values())]
)
def test_no_constructor_asks_for_more_than_sixteen_things(cls):
    assert len(inspect.signature(cls.__init__).parameters) - 1 <= 16


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_pickle(name):
    """As processes that are spawned need."""
    strategy = STRATEGIES[name](ViewSampler(16, overlap=0.7))
    twin = pickle.loads(pickle.dumps(strategy))
    assert twin.state_dict().keys() == strategy.state_dict().keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_logs_the_deviation_of_its_features(name, monkeypatch):
    """Above 0 for images that differ, at most 1 by its definition."""
    monkeypatch.setattr(Strategy, "global_rank", 0)
    torch.manual_seed(0)
    strategy = STRATEGIES[name](ViewSampler(16, overlap=0.7)).eval()
    data = both()
    data.setup("fit")
    strategy.seed("fit", 0)
    strategy._step(next(iter(data.val_dataloader())))
    assert 0 < strategy.logged["feature_std"].item() <= 1.0


def test_series_train_what_takes_them_and_are_refused_elsewhere(tmp_path):
    class OfAll(Mean):
        TAKES_SERIES: ClassVar = True
        seen: ClassVar[list] = []

        def losses(self, batch):
            views = self.views.series(batch, self.generator)
            self.seen.append([len(views), batch.images.shape[1]])
            return {"mean": (self.backbone(views[2].image, ["a"])["a"].mean() - 1) ** 2}

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    data = PhantomDataModule(
        subjects=5, visits=3, visits_per_item=3, size=24, spacing=7.0, split=(0.6, 0.4, 0.0), batch_size=3
    )
    trainer = L.Trainer(max_steps=2, default_root_dir=tmp_path, **options)
    task = OfAll(make().backbone, ViewSampler(8))
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 2
    assert task.seen == [[3, 3]] * len(task.seen)
    assert len(trainer.predict(task, datamodule=data)) == 15  # every visit once
    with pytest.raises(InputError, match=r"visits_per_item is 3, and Mean takes pairs of visits; set it to 2"):
        L.Trainer(max_steps=1, default_root_dir=tmp_path, **options).fit(make(), datamodule=data)
