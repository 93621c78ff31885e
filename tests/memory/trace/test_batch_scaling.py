"""Traces of all batch sizes from two."""

from __future__ import annotations

from dataclasses import replace

import pytest
from traced_steps import lives, of_events, small

from nvae_lowmem.memory.trace.batch_scaling import NotAffine, affine


@pytest.mark.parametrize(("chunk_bytes", "batches"), [(64 << 20, (2, 3, 9)), (4_000, (3, 2, 5))])
def test_two_traces_give_the_trace_of_another_batch(chunk_bytes: int, batches: tuple[int, int, int]) -> None:
    plan = {"keep": "input", "precision": "fp16", "likelihood_chunk_bytes": chunk_bytes, "offload_optimizer": True}
    first, second, wanted = (small(b, **plan) for b in batches)
    made = affine(first, second)(batches[2])
    assert lives(made) == lives(wanted)
    assert (made.events, made.marks, made.micro_batch) == (wanted.events, wanted.marks, wanted.micro_batch)


def test_whole_chunks_of_several_images_are_extended() -> None:
    plan = {"likelihood_chunk_bytes": 60_000}
    chunk = small(2, **plan).chunk_images
    assert 1 < chunk < 8
    assert [len(starts) for starts in small(chunk, **plan).chunks] == [1, 1]
    assert [len(starts) for starts in small(chunk + 1, **plan).chunks] == [2, 2]
    made = affine(small(2 * chunk, **plan), small(3 * chunk, **plan))
    assert lives(made(5 * chunk)) == lives(small(5 * chunk, **plan))
    for other in (chunk, 3 * chunk + 1):
        with pytest.raises(NotAffine, match=f"{chunk} images at a time"):
            made(other)


def test_chunks_that_leave_more_than_they_find_are_not_affine() -> None:
    """As a plain ValueError this would end a prediction, which traces the batch itself where NotAffine says so."""
    one_leaves_64_bytes = of_events([0, 1], micro_batch=2, chunk_images=1, chunks=[[0, 1]])
    with pytest.raises(NotAffine, match="cannot be repeated: events 0 to 1 free .* and leave"):
        affine(one_leaves_64_bytes, of_events([0, 1, 2], micro_batch=3, chunk_images=1, chunks=[[0, 1, 2]]))


def test_traces_that_do_not_belong_together_are_told_apart() -> None:
    with pytest.raises(NotAffine, match="micro-batch 2"):
        affine(small(2), small(2))
    with pytest.raises(NotAffine, match="events"):
        affine(small(2), small(3, keep="input"))
    with pytest.raises(NotAffine, match="bytes at micro-batch 2"):
        affine(small(2), replace(small(4), allocations=[replace(a, nbytes=a.nbytes + 1) for a in small(4).allocations]))
