"""KeyQueue: the newest keys in order, and whose they are."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from torch import Tensor

from lssl.networks.queue import KeyQueue


def numbered(start: int, count: int) -> tuple[Tensor, Tensor]:
    """Keys that say their own number, and ids ten times as large."""
    numbers = torch.arange(start, start + count)
    return numbers[:, None].float() * torch.tensor([1.0, -1.0]), 10 * numbers


def chronological(queue: KeyQueue) -> list[int]:
    """Numbers of the keys from the oldest to the newest, -1 for empty places; the ids must say the same."""
    keys, subject_ids = (rows.roll(-int(queue.pointer), 0) for rows in (queue.keys, queue.subject_ids))
    assert torch.equal(keys[:, 1], -keys[:, 0])
    assert torch.equal(subject_ids[subject_ids >= 0], 10 * keys[subject_ids >= 0, 0].long())
    return torch.where(subject_ids >= 0, subject_ids // 10, -1).tolist()


def test_starts_empty():
    queue = KeyQueue(4, 2)
    assert queue.keys.shape == (4, 2)
    assert queue.subject_ids.tolist() == [-1] * 4


def test_keys_lie_in_order_and_the_oldest_is_overwritten_first():
    queue = KeyQueue(5, 2)
    queue.push(*numbered(1, 3))
    assert queue.keys[:, 0].tolist() == [1, 2, 3, 0, 0]
    assert queue.subject_ids.tolist() == [10, 20, 30, -1, -1]
    queue.push(*numbered(4, 4))
    assert queue.keys[:, 0].tolist() == [6, 7, 3, 4, 5]
    assert queue.subject_ids.tolist() == [60, 70, 30, 40, 50]
    assert chronological(queue) == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("before", [0, 2, 5])
@pytest.mark.parametrize("count", [5, 6, 13])
def test_of_more_keys_than_places_the_newest_stay(before: int, count: int):
    queue = KeyQueue(5, 2)
    queue.push(*numbered(100, before))
    queue.push(*numbered(1, count))
    assert chronological(queue) == list(range(count - 4, count + 1))
    queue.push(*numbered(count + 1, 1))
    assert chronological(queue) == list(range(count - 3, count + 2))


def test_like_a_deque_whatever_is_pushed(generator):
    queue, expected, seen = KeyQueue(7, 2), deque([-1] * 7, maxlen=7), 0
    for count in torch.randint(0, 12, (60,), generator=generator).tolist():
        queue.push(*numbered(seen, count))
        expected.extend(range(seen, seen + count))
        seen += count
        assert chronological(queue) == list(expected)


def test_is_kept_in_checkpoints():
    queue = KeyQueue(5, 2)
    queue.push(*numbered(1, 7))
    other = KeyQueue(5, 2)
    other.load_state_dict(queue.state_dict())
    assert chronological(other) == [3, 4, 5, 6, 7]
    for resumed in (queue, other):
        resumed.push(*numbered(8, 2))
    assert all(torch.equal(one, two) for one, two in zip(queue.buffers(), other.buffers(), strict=True))
    assert set(queue.state_dict()) == {"keys", "subject_ids", "pointer"}


def test_is_free_of_gradients_and_a_copy():
    queue = KeyQueue(5, 2)
    keys, subject = numbered(1, 3)
    student = keys.clone().requires_grad_()
    queue.push(2 * student, subject)
    assert not list(queue.parameters())
    assert not any(buffer.requires_grad for buffer in queue.buffers())
    kept = queue.keys.clone()
    with torch.no_grad():
        student.add_(100)
    subject.add_(100)
    assert torch.equal(queue.keys, kept)
    assert queue.subject_ids[:3].tolist() == [10, 20, 30]


def test_keys_of_half_precision_are_kept_as_float32():
    queue = KeyQueue(5, 2)
    keys, subject = numbered(1, 3)
    queue.push(keys.bfloat16(), subject)
    assert queue.keys.dtype == torch.float32
    assert chronological(queue) == [-1, -1, 1, 2, 3]
