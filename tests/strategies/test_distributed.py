"""Two processes that share a batch learn what one process with the whole batch learns.

Two gloo processes run every case once, side by side; the tests compare what they wrote down with one process.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, multiprocessing
from two_ranks import (
    AGES,
    CASES,
    LOSS_CASES,
    MISTAKES,
    PAIRS,
    PGL,
    RANKS,
    SUBJECTS,
    Views,
    gradients,
    loss_gradients,
    part,
    ragged,
    work,
)

from lssl.views.sampler import ViewSampler


@pytest.fixture(scope="module")
def batches(make_batch) -> dict[str, Views]:
    """Views of four pairs; of the last two, one view may show air alone (``air``), or another place (``apart``)."""
    batch = dataclasses.replace(make_batch(PAIRS), subject=SUBJECTS, ages=AGES)
    first, second = ViewSampler(16)(batch, torch.Generator().manual_seed(0))
    affine, foreground = second.affine.clone(), second.source_foreground.clone()
    affine[2:, :3, 3] += 1000.0
    foreground[2:] = False
    return {
        "full": (first, second, batch),
        "air": (first, dataclasses.replace(second, source_foreground=foreground), batch),
        "apart": (first, dataclasses.replace(second, affine=affine), batch),
    }


@pytest.fixture(scope="module")
def together(batches, tmp_path_factory) -> list[dict]:
    """What each rank wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(batches, folder / "batches.pt")
    multiprocessing.start_processes(work, (str(folder),), nprocs=RANKS, start_method="fork")  # imports take longest
    return [torch.load(folder / f"results{own}.pt", weights_only=False) for own in range(RANKS)]


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm, of all gradients together."""
    one, two = (torch.cat([g[name].flatten() for name in expected if name != "loss"]) for g in (found, expected))
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_the_average_of_the_ranks_gradients_is_that_of_the_whole_batch(case: tuple[str, str], batches, together):
    expected = gradients(case[0], batches[case[1]])
    found = together[0][case]
    assert found.keys() == expected.keys()
    norms = {name: gradient.norm().item() for name, gradient in expected.items() if name != "loss"}
    total = sum(norm**2 for norm in norms.values()) ** 0.5
    assert total > 1e-3
    assert error(found, expected) < 1e-5
    for name, norm in norms.items():
        if norm > 1e-3 * total:
            assert (found[name] - expected[name]).norm().item() < 1e-5 * norm, name
    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert all(torch.equal(found[name], together[1][case][name]) for name in found)


@pytest.mark.parametrize("name", PGL)
def test_with_nothing_to_compare_every_parameter_keeps_a_gradient_of_zero(name: str, batches):
    """Else distributed training would wait for it; and ``skipped`` pairs must not pull at the weights."""
    pairs = slice(2, 4)
    found = gradients(name, tuple(part(data, pairs) for data in batches["apart"]), pairs)
    for parameter, gradient in found.items():
        assert gradient is not None, parameter
        assert gradient.abs().max() == 0, parameter


@pytest.mark.parametrize("name", MISTAKES)
def test_the_comparison_finds_mistakes(name: str, batches, together):
    (strategy, data), *_ = MISTAKES[name]
    assert error(together[0][name], gradients(strategy, batches[data])) > 1e-2


@pytest.mark.parametrize("case", LOSS_CASES, ids=", ".join)
def test_losses_with_weights_are_those_of_the_whole_batch(case: tuple[str, str], together):
    expected = loss_gradients(*case, slice(None))
    found = together[0][case]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["rows"], expected["rows"], rtol=1e-5, atol=1e-7)
    assert (expected["rows"].norm() > 1e-3) == (case[1] != "none")


@pytest.mark.parametrize("kind", ["plain", "transposed", "long", "strided"])
def test_gather_is_in_rank_order_whatever_the_layout(kind: str, together):
    expected = torch.cat([ragged(own)[kind] for own in range(RANKS)])
    for results in together:
        assert torch.equal(results[f"gather {kind}"], expected)


def test_each_process_knows_its_place(together):
    assert [results["rank"] for results in together] == [(0, 2), (1, 2)]


def test_queue_holds_the_keys_of_all_ranks_in_rank_order(together):
    for results in together:
        queue = results["queue"]  # pushed: 0 1 2, 5 6 7; then 10 11 12, 15 16 17
        assert queue["keys"][:, 0].tolist() == [11, 12, 15, 16, 17, 7, 10]
        assert queue["subject_ids"].tolist() == [111, 112, 115, 116, 117, 107, 110]
        assert queue["pointer"].item() == 5


def test_alone_asks_no_other_process(together):
    found = together[0]["alone"]
    assert found["gather"].tolist() == [1, 3]
    assert found["mean"].item() == 2
    assert found["weighted"].item() == 2.5
    assert (found["size"].item(), found["rank"].item()) == (1, 0)
    expected = loss_gradients("NTXent", "mixed", slice(0, 2))
    for name in ("loss", "rows"):
        torch.testing.assert_close(found[name], expected[name])
    for results in together:
        assert results["together again"][0].tolist() == [0, 1]
        assert results["together again"][1] == RANKS
