"""The study of what ranks the pairs: its variants, and that it changes nothing for others."""

from __future__ import annotations

import pytest
from nutgraf import load_compressor
from nutgraf.benchmarks.studies.kv_match import ADOPTED, variants, variants_of
from nutgraf.compressors.kv import repair, selection

TEXT = "The treaty was signed in 1648 in Westphalia, ending thirty years of war among the great powers of Europe."


@pytest.mark.slow
def test_the_adopted_variant_is_what_kv_match_does_and_no_other_is(zoo):
    reader = zoo.reader("llama")
    before = dict(selection.SCORES), selection.FLOOR, repair.VALUE_RIDGE
    made = variants_of(reader, TEXT, [3.0])
    assert before == (selection.SCORES, selection.FLOOR, repair.VALUE_RIDGE)
    assert {name for name, _ in made} == set(variants(reader))
    (ours,) = load_compressor("kv-match", reader=reader).compress([TEXT], ratio=3.0)
    assert made[ADOPTED, 3.0].to_bytes() == ours.to_bytes()
    # Constants alone change what is fitted, and a score what is kept.
    assert (made[f"{ADOPTED}, value ridge 1e-1", 3.0].positions == ours.positions).all()
    assert made[f"{ADOPTED}, value ridge 1e-1", 3.0].to_bytes() != ours.to_bytes()
    assert made["p^2", 3.0].to_bytes() != ours.to_bytes()
