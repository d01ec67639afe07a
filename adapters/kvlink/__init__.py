"""Link tokens for transformers models: documents encoded alone, and learned tokens between them that read across."""

from kvstore.adapters.kvlink.layout import compose, lay_out
from kvstore.adapters.kvlink.links import LinkTokens, add_links
from kvstore.adapters.kvlink.mask import additive, block_mask

__all__ = ["LinkTokens", "add_links", "additive", "block_mask", "compose", "lay_out"]
