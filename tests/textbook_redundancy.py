"""The measures of redundancy as a textbook writes them, on a forward pass unrolled by hand."""

import pytest
import torch
from textbook import cosines, flat, mean, mean_of
from unrolled import embedded, patches, qkv_weights, swin_block, vit_block

from diversity.measures import measures_of


def textbook_report(name, model, samples):
    """What `measure_redundancy` must return, from a forward pass written out and all images at once."""
    blocks, tokens, firsts, maps = unrolled_layers(name, model.eval(), samples)
    shares = [variance_shares(x.flatten(0, 1)) for x in tokens]
    embedding = {
        "token_cosine": [mean_of(lambda x: different(cosines(x, x)).mean(), x) for x in tokens],
        "token_abscosine": [mean_of(lambda x: different(cosines(x, x)).abs().mean(), x) for x in tokens],
        "first_cosine": [
            mean_of(lambda a, b: cosines(a, b).diagonal().mean(), *pair) for pair in zip(firsts, tokens, strict=True)
        ],
        "effective_rank": [mean_of(lambda x: textbook_rank(torch.linalg.svdvals(x)), x) for x in tokens],
        "components_90": [next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.9) for s in shares],
    }
    attention = {
        "head_cosine": [mean(different(cosines(a, a)).mean() for a in flat(m)) for m in maps],
        "row_std": [((m - 1 / m.shape[-1]) ** 2).mean(dim=-1).sqrt().mean() for m in maps],
        "row_entropy": [-torch.xlogy(m, m).sum(dim=-1).mean() for m in maps],
        "previous_cosine": [None, *(previous_cosine(blocks, maps, i) for i in range(1, len(maps)))],
    }
    weight, spectra = {}, {}
    for block in blocks:
        for matrix_name, matrix in matrices(block).items():
            singular = torch.linalg.svdvals(matrix)
            similarity = different(cosines(matrix, matrix)).abs()
            measures = {
                "effective_rank": textbook_rank(singular),
                "condition_number": torch.linalg.cond(matrix),
                "row_abscosine": similarity.mean(),
                "smallest_angle": torch.rad2deg(torch.arccos(similarity.max())),
            }
            for measure, value in measures.items():
                weight.setdefault(matrix_name, {}).setdefault(measure, []).append(value)
            spectra.setdefault(matrix_name, []).append(singular)
    stages = [0, 2] if "swin" in name else [0]
    report = {
        "images": len(samples),
        "stages": stages,
        "embedding": embedding,
        "attention": attention,
        "weight": weight,
    }
    return report | {"variance": shares, "spectra": spectra, "summary": textbook_summary(report)}


def unrolled_layers(name, model, samples):
    """The blocks; tokens of every layer; for each layer what it is compared with; the maps of every block."""
    if "swin" in name:
        x, blocks, tokens, firsts, maps = model.patch_embed(samples), [], [], [], []
        tokens, firsts = [patches(name, x)], [patches(name, x)]
        for stage in model.layers:
            x = stage.downsample(x)
            first = patches(name, x)
            for block in stage.blocks:
                x, block_maps = swin_block(block, x)
                blocks, maps = [*blocks, block], [*maps, block_maps]
                tokens, firsts = [*tokens, patches(name, x)], [*firsts, first]
        return blocks, tokens, firsts, maps
    x, context = embedded(name, model, samples)
    tokens, maps = [patches(name, x)], []
    for block in model.blocks:
        x, block_maps = vit_block(block, x, **context)
        tokens, maps = [*tokens, patches(name, x)], [*maps, block_maps]
    return list(model.blocks), tokens, tokens[:1] * len(tokens), maps


def different(matrix):
    """Entries (i, j) with i != j."""
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)]


def textbook_rank(singular):
    shares = singular / singular.sum()
    return torch.exp(-sum(share * torch.log(share) for share in shares if share > 0))


def variance_shares(rows):
    variances = torch.linalg.svdvals(rows - rows.mean(dim=0)) ** 2
    shares = torch.zeros(rows.shape[1], dtype=rows.dtype)
    shares[: len(variances)] = variances / variances.sum()
    return shares


def previous_cosine(blocks, maps, i):
    """None where the windows of two blocks hold different patches."""
    same = maps[i].shape == maps[i - 1].shape
    same = same and getattr(blocks[i], "shift_size", 0) == getattr(blocks[i - 1], "shift_size", 0)
    return mean_of(lambda a, b: cosines(a, b).mean(), flat(maps[i - 1]), flat(maps[i])) if same else None


def matrices(block):
    further = {"proj": block.attn.proj, "fc1": getattr(block.mlp, "fc1", None), "fc2": block.mlp.fc2}
    further = {name: layer.weight for name, layer in further.items() if layer is not None}
    return dict(zip("qkv", qkv_weights(block.attn), strict=True)) | further


def textbook_summary(report):
    every = [value for values in report["weight"].values() for value in zip(*values.values(), strict=True)]
    qkv = [value for name in "qkv" for value in zip(*report["weight"][name].values(), strict=True)]
    values = {f"embedding_{measure}": layers[1:] for measure, layers in report["embedding"].items()}
    values |= {f"embedding_{measure}_last": [layers[-1]] for measure, layers in report["embedding"].items()}
    values |= {f"attention_{measure}": blocks for measure, blocks in report["attention"].items()}
    values |= {f"attention_{measure}_first": [blocks[0]] for measure, blocks in report["attention"].items()}
    values |= dict(zip((f"weight_{m}" for m in measures_of("weight")), zip(*every, strict=True), strict=True))
    values |= dict(zip((f"weight_{m}_qkv" for m in measures_of("weight")), zip(*qkv, strict=True), strict=True))
    values = {key: torch.tensor([v for v in layers if v is not None]).double() for key, layers in values.items()}
    return {
        key: layers.log().mean().exp() if "condition" in key else layers.mean()
        for key, layers in values.items()
        if len(layers)
    }


def flattened(report, path=""):
    """{path: number} of a nested report, tensors included; what is None is left out."""
    if isinstance(report, dict):
        return {key: v for name, value in report.items() for key, v in flattened(value, f"{path}/{name}").items()}
    if isinstance(report, list) or (torch.is_tensor(report) and report.dim()):
        return flattened(dict(enumerate(report)), path)
    return {} if report is None else {path: float(report)}


def assert_close(report, expected, rel=1e-9, abs=1e-9):
    assert flattened(report) == pytest.approx(flattened(expected), rel=rel, abs=abs)
