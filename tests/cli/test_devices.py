"""Ways of using several devices: which are refused, and what ModelParallelStrategy is set to."""

import pytest
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lssl.cli.devices import chosen, refuse_sharding, spread
from lssl.utils.errors import InputError

PATH = "lightning.pytorch.strategies.ModelParallelStrategy"


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed_stage_2", "lightning.pytorch.strategies.FSDPStrategy"])
def test_other_sharding_is_refused(strategy):
    with pytest.raises(InputError, match="use ModelParallelStrategy"):
        refuse_sharding(strategy)


def test_what_sharding_cannot_do_is_refused():
    for fine in ("auto", "ddp", "lightning.pytorch.strategies.DDPStrategy", None):
        refuse_sharding(fine, sync_batchnorm=True, compiled=True)
    refuse_sharding(PATH)
    with pytest.raises(InputError, match=r"trainer\.sync_batchnorm"):
        refuse_sharding("ModelParallelStrategy", sync_batchnorm=True)
    with pytest.raises(InputError, match=r"backbone\.compile"):
        refuse_sharding(PATH, compiled=True)


def test_a_name_becomes_the_strategy_and_only_training_shards():
    assert isinstance(chosen("ModelParallelStrategy", "fit"), ModelParallelStrategy)
    given, other = ModelParallelStrategy(2, 1), DDPStrategy()
    assert chosen(given, "fit") is given
    assert chosen(given, "test") == chosen("modelparallelstrategy", "predict") == "auto"
    for command in ("fit", "test"):
        assert chosen("ddp", command) == "ddp"
        assert chosen(other, command) is other


def test_weights_are_spread_over_all_devices_and_saved_as_one_file():
    strategy = ModelParallelStrategy()
    spread(strategy, 4)
    sizes = strategy._data_parallel_size, strategy._tensor_parallel_size
    assert (*sizes, strategy._save_distributed_checkpoint) == (4, 1, False)
    with pytest.raises(InputError, match="tensor_parallel_size must be 1, not 2"):
        spread(ModelParallelStrategy(tensor_parallel_size=2), 4)
    with pytest.raises(InputError, match="data_parallel_size must be 4, not 2"):
        spread(ModelParallelStrategy(data_parallel_size=2), 4)
    spread(DDPStrategy(), 4)
