"""Our search on T5's weights against Hugging Face's `generate` with the same weights and a prefix mask: same SIDs, same scores."""

import pytest
import torch

from benchmarks.peers_generate import CsrMask, PrefixFunction, Static, T5Steps, hugging_face, t5
from oxyray.generate.beam import beam_search
from oxyray.generate.pools import Legal
from oxyray.model.head import Tree
from tests.generate.tiny import catalogue

pytestmark = pytest.mark.filterwarnings("ignore:.*a request's pool holds")


@pytest.mark.parametrize("normalise", ["children", "vocabulary"])
@pytest.mark.parametrize(("requests", "beams"), [(1, 2), (1, 256), (8, 16), (8, 256)])
def test_the_same_beams_as_hugging_face_t5(requests, beams, normalise):
    model = t5(codes=24, width=32, layers=2, heads=4)
    _, index = catalogue(0, 1500, 24)
    memory_BSD = torch.randn(requests, 11, 32, generator=torch.Generator().manual_seed(beams))
    visible_BS = torch.arange(11) < torch.arange(4, 12)[:requests, None]
    codes_BKL, score_BK = hugging_face(model, memory_BSD, visible_BS, CsrMask(index, normalise), beams)
    steps = T5Steps(model, memory_BSD, visible_BS, Tree(index))
    found = beam_search(steps, Legal(steps.tree, [None] * requests), beams, normalise)
    torch.testing.assert_close(found.logprob_BK, score_BK, atol=1e-4, rtol=0)
    check_sids(found, codes_BKL, index)
    if normalise == "vocabulary":
        static = Static(index).search(T5Steps(model, memory_BSD, visible_BS, steps.tree), beams)
        torch.testing.assert_close(found.logprob_BK, static[1], atol=1e-4, rtol=0)
        check_sids(found, static[0], index)
        codes_BKL, score_BK = hugging_face(model, memory_BSD, visible_BS, PrefixFunction(index), beams)
        torch.testing.assert_close(found.logprob_BK, score_BK, atol=1e-4, rtol=0)
        check_sids(found, codes_BKL, index)


def check_sids(found, codes_BKL, index):
    """Rank by rank, ties aside: SIDs may only differ from one order to the other where scores are within 1e-4."""
    for b in range(len(codes_BKL)):
        want = index.leaf_of(codes_BKL[b].numpy())
        score = dict(zip(found.leaf_BK[b].tolist(), found.logprob_BK[b].tolist(), strict=True))
        assert (want >= 0).all()
        last = min(score.values())
        for place, leaf in enumerate(want.tolist()):
            assert abs(score.get(leaf, last) - float(found.logprob_BK[b, place])) < 1e-4
