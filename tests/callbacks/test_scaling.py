"""The global batch is said in numbers that add up."""

from lssl.callbacks.scaling import scaling


def test_the_global_batch_is_stated():
    assert scaling(2, 1, 1, 1e-3) == ""
    text = scaling(2, 4, 1, 1e-3)
    assert text.startswith("4 processes × 2 pairs = 8 pairs a step. The learning rate stays 0.001")
    assert "0.004 (linear, for SGD) or 0.002 (square root, for Adam) are customary for 8" in text
    assert "negatives" not in text
    text = scaling(2, 2, 8, 1e-3)
    assert "8 steps make an update of 32 pairs" in text
    assert "those of the 4 pairs of a step" in text
    assert "0.016 (linear, for SGD) or 0.004 (square root" in text
