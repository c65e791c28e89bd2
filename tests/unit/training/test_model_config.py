"""Options of layers that need others, or exclude them, are refused before a model is built."""

from __future__ import annotations

from tests.unit.reference.test_fingerprint import configurations

FACTORS = "--rotary-factors 1 1.5 2 3"
YARN = "--position-embedding-type yarn --yarn-original-max-position-embeddings 128"
REFUSED = {
    "--qk-norm-over-heads": "--qk-norm-over-heads is a kind of --qk-layernorm: give both",
    "--norms-without-bias": "--norms-without-bias: an RMSNorm has none",
    "--normalization LayerNorm --parallel-layers --layer-norms after": "--parallel-layers: their norm is before both",
    "--latent-norm-epsilon 1e-6": "--latent-norm-epsilon is of --multi-latent-attention",
    "--local-rotary-base 10000": "--local-rotary-base is of layers with a window",
    "--rotary-attention-factor 1.2": "--rotary-attention-factor, --rotary-factors-until: only beside --rotary-factors",
    "--rotary-factors 1 2": "--rotary-factors: 4 numbers, one for each frequency",
    f"{FACTORS} {YARN}": "--rotary-factors: only with --position-embedding-type rope",
    f"{FACTORS} --rotary-factors-until 16": "--seq-length 512: the model's rotary factors are those",
}


def refusals() -> list[str]:
    """On a rank: what each command line is answered."""
    from megatron_bdpo.errors import UserError

    found = []
    for flags in REFUSED:
        try:
            configurations([(flags, 1)])
            found.append("taken")
        except UserError as error:
            found.append(str(error))
    return found


def test_options_that_do_not_go_together(ranks):
    (found,) = ranks(1)(refusals)
    for (flags, expected), told in zip(REFUSED.items(), found, strict=True):
        assert told.startswith(expected), flags


def test_lists_are_flags(ranks):
    config, _ = ranks(1)(configurations, [(FACTORS, 1)])[0]
    assert config.layers.rotary_factors == [1.0, 1.5, 2.0, 3.0]
