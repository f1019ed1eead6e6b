"""FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the last blocks' adapters stay on the client, the rest is shared.

``fedper.personal-blocks`` counts them from the output. There is no global model.
"""

from __future__ import annotations

import functools
import re

from fedgen_app.errors import SettingsError
from fedgen_app.federation.method import GlobalState, Method, Round
from fedgen_app.learning.adapters import Adapter, Layout

# Where a block lies: encoder before U-Net, its three parts in order, and number within the part.
Block = tuple[int, int, int]

UNET = re.compile(r"(?:^|\.)(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?")
NUMBERED = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks|block|transformer_blocks|single_transformer_blocks)\.(\d+)\.")
PARTS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
SINGLE = "single_transformer_blocks."  # of a DiT: they follow the others
# What lies behind the last block; of a GAN or VAE behind that of each half.
HALVES = r"(?:generator|discriminator|encoder|decoder)\.(?:features|output)"
OUTPUT = re.compile(rf"(?:^|\.)(?:lm_head|embed_out|conv_out|proj_out|{HALVES})\.")


def block_of(key: str) -> Block | None:
    """The block that a key's layer lies in; None of a layer before, behind or beside all blocks."""
    encoder = 0 if ".text_encoder." in key else 1
    if found := UNET.search(key):
        return encoder, PARTS[found[1]], int(found[2] or 0)
    if found := NUMBERED.search(key):
        return encoder, int(SINGLE in key), int(found[1])
    return None


@functools.lru_cache(maxsize=8)
def personal_keys(layout: Layout, count: int) -> frozenset[str]:
    """The keys of the last ``count`` blocks, and of what lies behind them.

    Raises:
        SettingsError: there are not more blocks than that, so that nothing would be shared.
    """
    blocks = sorted({block for key, _ in layout if (block := block_of(key))})
    if len(blocks) <= count:
        raise SettingsError(
            f"fedper.personal-blocks = {count}: the adapter lies in {len(blocks)} blocks, and at least one has to be "
            "shared"
        )
    last = set(blocks[-count:])
    return frozenset(
        key for key, _ in layout if block_of(key) in last or (block_of(key) is None and OUTPUT.search(key))
    )


def is_shared(key: str, round_: Round) -> bool:
    """Whether the key's layer lies before the personal blocks."""
    return key not in personal_keys(round_.layout, round_.settings.fedper.personal_blocks)


def shared(state: GlobalState, round_: Round) -> Adapter:
    """The shared blocks; a client's own ones are where they were trained."""
    return {key: tensor for key, tensor in state.adapter.items() if is_shared(key, round_)}


METHOD = Method(sends=shared, shares=is_shared, has_global=False)
