"""Named points: a paper that sets known parts at known places, without a part of its own."""
