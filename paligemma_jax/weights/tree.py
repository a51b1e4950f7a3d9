"""The shape of every parameter that a configuration asks for, by its path.

Paths join the keys of the nested dict with "/", e.g. "llm/layers/attn/q_einsum/w".
"""

from paligemma_jax.config import GemmaConfig, PaliGemmaConfig, SigLIPConfig
from paligemma_jax.models.paths import flatten as flatten
from paligemma_jax.models.paths import nest as nest

Shape = tuple[int, ...]


def expected_shapes(config: PaliGemmaConfig) -> dict[str, Shape]:
    """Every parameter's path and shape, layers stacked on a leading axis."""
    return _img_shapes(config.img, config.llm.width) | _llm_shapes(config.llm)


def _img_shapes(c: SigLIPConfig, out_width: int) -> dict[str, Shape]:
    heads = (c.num_heads, c.head_dim)
    shapes: dict[str, Shape] = {
        "patch_embed/kernel": (c.patch_size, c.patch_size, 3, c.width),
        "patch_embed/bias": (c.width,),
        "pos_embed": (1, c.num_patches, c.width),
    }
    layer: dict[str, Shape] = {}
    for norm in ("norm1", "norm2"):
        layer |= {f"{norm}/scale": (c.width,), f"{norm}/bias": (c.width,)}
    for projection in ("q", "k", "v"):
        layer |= {
            f"attn/{projection}/kernel": (c.width, *heads),
            f"attn/{projection}/bias": heads,
        }
    layer |= {"attn/out/kernel": (*heads, c.width), "attn/out/bias": (c.width,)}
    layer |= {"mlp/fc1/kernel": (c.width, c.mlp_dim), "mlp/fc1/bias": (c.mlp_dim,)}
    layer |= {"mlp/fc2/kernel": (c.mlp_dim, c.width), "mlp/fc2/bias": (c.width,)}
    shapes |= {f"blocks/{name}": (c.depth, *shape) for name, shape in layer.items()}
    shapes |= {"norm/scale": (c.width,), "norm/bias": (c.width,)}
    shapes |= {"head/kernel": (c.width, out_width), "head/bias": (out_width,)}
    return {f"img/{name}": shape for name, shape in shapes.items()}


def _llm_shapes(c: GemmaConfig) -> dict[str, Shape]:
    layer: dict[str, Shape] = {
        "attn/q_einsum/w": (c.num_heads, c.width, c.head_dim),
        "attn/kv_einsum/w": (2, c.num_kv_heads, c.width, c.head_dim),
        "attn/attn_vec_einsum/w": (c.num_heads, c.head_dim, c.width),
        "mlp/gating_einsum/w": (2, c.width, c.mlp_dim),
        "mlp/linear/w": (c.mlp_dim, c.width),
        "pre_attention_norm/scale": (c.width,),
        "pre_ffw_norm/scale": (c.width,),
    }
    if c.post_norms:
        layer |= {"post_attention_norm/scale": (c.width,), "post_ffw_norm/scale": (c.width,)}
    shapes: dict[str, Shape] = {"embedder/input_embedding": (c.vocab_size, c.width)}
    shapes |= {f"layers/{name}": (c.depth, *shape) for name, shape in layer.items()}
    shapes["final_norm/scale"] = (c.width,)
    if not c.tie_embeddings:
        shapes["lm_head/w"] = (c.vocab_size, c.width)
    return {f"llm/{name}": shape for name, shape in shapes.items()}
