"""The measures of redundancy as a textbook writes them, on a forward pass unrolled by hand."""

import pytest
import torch
from families import FAMILIES
from textbook import cosines, flat, mean, mean_of
from unrolled import embedded, patches, qkv_weights, swin_parts, vit_parts


def textbook_report(name, model, samples, labels=None):
    """What `measure_redundancy` must return, from a forward pass written out and all images at once."""
    blocks, tokens, firsts, befores, parts = unrolled_layers(name, model.eval(), samples)
    maps, prefix = [of_block["maps"] for of_block in parts], FAMILIES[name].num_prefix_tokens
    shares = [variance_shares(x.flatten(0, 1)) for x in tokens]
    splits = [variance_split(x, labels) for x in tokens]
    embedding = {
        "token_cosine": [mean_of(lambda x: different(cosines(x, x)).mean(), x) for x in tokens],
        "token_abscosine": [mean_of(lambda x: different(cosines(x, x)).abs().mean(), x) for x in tokens],
        "first_cosine": [
            mean_of(lambda a, b: cosines(a, b).diagonal().mean(), *pair) for pair in zip(firsts, tokens, strict=True)
        ],
        "block_influence": [None]
        + [
            1 - mean_of(lambda a, b: cosines(a, b).diagonal().mean(), *pair)
            for pair in zip(befores, tokens[1:], strict=True)
        ],
        "high_frequency": [mean_of(high_frequency, x) for x in tokens],
        "participation_ratio": [mean_of(lambda x: participation(torch.linalg.svdvals(x)), x) for x in tokens],
        "effective_rank": [mean_of(lambda x: textbook_rank(torch.linalg.svdvals(x)), x) for x in tokens],
        "high_norm_tokens": [mean_of(high_norms, x) if x.shape[1] > 17 else None for x in tokens],
        "massive_activation": [mean_of(massive, x) for x in tokens],
        "components_90": [next(k for k in range(1, len(s) + 1) if s[:k].sum() >= 0.9) for s in shares],
        "stable_rank": [s.sum() / s.max() for s in shares],
        "rankme": [textbook_rank(torch.linalg.svdvals(torch.stack([mean(t) for t in x]))) for x in tokens],
        **{
            key: [split[i] for split in splits]
            for i, key in enumerate(("within_image", "within_class", "between_class"))
        },
    }
    attention = {
        "head_cosine": [mean(different(cosines(a, a)).mean() for a in flat(m)) for m in maps],
        "head_output_cosine": [head_outputs(block, part["heads"]) for block, part in zip(blocks, parts, strict=True)],
        "row_std": [((m - 1 / m.shape[-1]) ** 2).mean(dim=-1).sqrt().mean() for m in maps],
        "row_entropy": [-torch.xlogy(m, m).sum(dim=-1).mean() for m in maps],
        "distance": [distance(m, prefix, grid_of(model, block)) for block, m in zip(blocks, maps, strict=True)],
        "sink": [mean(head.mean(dim=0).max() for m in of_block for head in m) for of_block in maps],
        "previous_cosine": [None, *(previous_cosine(blocks, maps, i) for i in range(1, len(maps)))],
    }
    mlp = {"dead_units": [dead(block.mlp, part["to_mlp"]) for block, part in zip(blocks, parts, strict=True)]}
    weight, spectra, circuit, circuit_spectra = {}, {}, {}, {}
    for block in blocks:
        for matrix_name, matrix in matrices(block).items():
            singular = torch.linalg.svdvals(matrix)
            similarity = different(cosines(matrix, matrix)).abs()
            measures = {
                "effective_rank": textbook_rank(singular),
                "stable_rank": (matrix**2).sum() / torch.linalg.matrix_norm(matrix, 2) ** 2,
                "participation_ratio": participation(singular),
                "condition_number": torch.linalg.cond(matrix),
                "row_abscosine": similarity.mean(),
                "smallest_angle": torch.rad2deg(torch.arccos(similarity.max())),
            }
            for measure, value in measures.items():
                weight.setdefault(matrix_name, {}).setdefault(measure, []).append(value)
            spectra.setdefault(matrix_name, []).append(singular)
        for circuit_name, heads in circuits(block).items():
            singular = [torch.linalg.svdvals(head)[: len(head) // len(heads)] for head in heads]
            products = torch.stack([head.flatten() for head in heads])
            values = circuit.setdefault(circuit_name, {"effective_rank": [], "abscosine": []})
            values["effective_rank"].append(mean(map(textbook_rank, singular)))
            values["abscosine"].append(different(cosines(products, products)).abs().mean())
            circuit_spectra.setdefault(circuit_name, []).append(mean(s / s.max() for s in singular))
    report = {
        "images": len(samples),
        "stages": [0, 2] if "swin" in name else [0],
        "embedding": embedding,
        "attention": attention,
        "mlp": mlp,
        "weight": weight,
        "circuit": circuit,
        "cka": [[cka(x, y) for y in tokens] for x in tokens] if len(samples) > 3 else None,
    }
    report |= {"variance": shares, "spectra": spectra, "circuit_spectra": circuit_spectra}
    return report | {"summary": textbook_summary(report)}


def unrolled_layers(name, model, samples):
    """The blocks; tokens of every layer; for each what it is compared with; inputs and parts of every block."""
    blocks, befores, parts = [], [], []
    if "swin" in name:
        x = model.patch_embed(samples)
        tokens, firsts = [patches(name, x)], [patches(name, x)]
        for stage in model.layers:
            x = stage.downsample(x)
            first = patches(name, x)
            for block in stage.blocks:
                befores, blocks = [*befores, patches(name, x)], [*blocks, block]
                parts = [*parts, swin_parts(block, x)]
                x = parts[-1]["output"]
                tokens, firsts = [*tokens, patches(name, x)], [*firsts, first]
        return blocks, tokens, firsts, befores, parts
    x, context = embedded(name, model, samples)
    tokens = [patches(name, x)]
    for block in model.blocks:
        parts = [*parts, vit_parts(block, x, **context)]
        x = parts[-1]["output"]
        tokens = [*tokens, patches(name, x)]
    return list(model.blocks), tokens, tokens[:1] * len(tokens), tokens[:-1], parts


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


def participation(singular):
    return sum(s**2 for s in singular) ** 2 / sum(s**4 for s in singular)


def high_frequency(tokens):
    low = torch.ones(len(tokens), len(tokens), dtype=tokens.dtype) / len(tokens)  # 1 1^T / P
    return torch.linalg.matrix_norm(tokens - low @ tokens) / torch.linalg.matrix_norm(tokens)


def high_norms(tokens):
    norms = [token.norm() for token in tokens]
    center = mean(norms)
    deviation = mean((norm - center) ** 2 for norm in norms) ** 0.5
    return mean(torch.tensor(float(norm > center + 4 * deviation)) for norm in norms)


def massive(tokens):
    sizes = sorted(abs(value) for value in tokens.flatten().tolist())
    return torch.tensor(sizes[-1] / sizes[(len(sizes) - 1) // 2]).double()


def variance_split(tokens, labels):
    """Fractions of the squares within images, between the images of a class and between classes, token by token."""
    images = [mean(image) for image in tokens]
    overall, patches = mean(images), tokens.shape[1]
    within = sum(
        (token - center).square().sum() for image, center in zip(tokens, images, strict=True) for token in image
    )
    between = sum(patches * (center - overall).square().sum() for center in images)
    total = within + between
    if labels is None:
        return (within / total if len(tokens) > 1 else None, None, None)
    of_class = [mean(c for c, other in zip(images, labels, strict=True) if other == label) for label in labels]
    within_class = sum(patches * (a - b).square().sum() for a, b in zip(images, of_class, strict=True))
    between_class = sum(patches * (center - overall).square().sum() for center in of_class)
    return within / total, within_class / total, between_class / total


def head_outputs(block, heads):
    """Mean cosine of the contributions of different heads, each formed from a copy in which the others are zero."""
    values, width = [], heads.shape[-1] // block.attn.num_heads
    for image in heads:
        added = []
        for h in range(block.attn.num_heads):
            alone = torch.zeros_like(image)
            alone[:, h * width : (h + 1) * width] = image[:, h * width : (h + 1) * width]
            added.append((alone @ block.attn.proj.weight.T).flatten())
        values.append(different(cosines(torch.stack(added), torch.stack(added))).mean())
    return mean(values)


def grid_of(model, block):
    return getattr(block, "window_size", None) or model.patch_embed.grid_size


def distance(maps, prefix, grid):
    """Mean distance in patches, query by query and key by key."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    values = []
    for i, query in enumerate(places):
        lengths = [((query[0] - key[0]) ** 2 + (query[1] - key[1]) ** 2) ** 0.5 for key in places]
        rows = maps[:, :, prefix + i, prefix:]
        values.append(sum(rows[..., j] * length for j, length in enumerate(lengths)) / rows.sum(dim=-1))
    return mean(values).mean()


def dead(mlp, x):
    """Fraction of units that no token of any image makes positive."""
    if hasattr(mlp, "fc1_g"):
        units = mlp.act(mlp.fc1_g(x))
    else:
        units = mlp.fc1(x)
        if mlp.fc2.in_features < units.shape[-1]:  # gate and values in one matrix
            units = units.chunk(2, dim=-1)[1 if mlp.gate_last else 0]
        units = mlp.act(units)
    units = units.flatten(0, -2)
    return mean(torch.tensor(float(all(value <= 0 for value in units[:, k]))) for k in range(units.shape[1])).double()


def circuits(block):
    """The circuits [D, D] of every head."""
    q, k, v = (matrix.unflatten(0, (block.attn.num_heads, -1)) for matrix in qkv_weights(block.attn))
    o = block.attn.proj.weight.unflatten(1, (block.attn.num_heads, -1))
    return {
        "qk": [a.T @ b for a, b in zip(q, k, strict=True)],
        "ov": [o[:, h] @ value for h, value in enumerate(v)],
    }


def cka(first, second):
    """Linear CKA of the mean tokens of two layers, as the unbiased estimate of HSIC is written in the paper."""
    values = []
    for pair in ((first, second), (first, first), (second, second)):
        x, y = (torch.stack([mean(image) for image in tokens]) for tokens in pair)
        k, m = (gram - torch.diag(gram.diagonal()) for gram in (x @ x.T, y @ y.T))
        n, one = len(k), torch.ones(len(k), dtype=k.dtype)
        sums = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
        values.append(((k @ m).trace() + sums) / (n * (n - 3)))
    return values[0] / (values[1] * values[2]).sqrt() if values[1] > 0 and values[2] > 0 else None


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
    values = {f"embedding_{measure}": layers[1:] for measure, layers in report["embedding"].items()}
    values |= {f"embedding_{measure}_last": [layers[-1]] for measure, layers in report["embedding"].items()}
    values |= {f"attention_{measure}": blocks for measure, blocks in report["attention"].items()}
    values |= {f"attention_{measure}_first": [blocks[0]] for measure, blocks in report["attention"].items()}
    values |= {f"mlp_{measure}": blocks for measure, blocks in report["mlp"].items()}
    for measure in report["weight"]["q"]:
        values[f"weight_{measure}"] = [v for matrix in report["weight"].values() for v in matrix[measure]]
        values[f"weight_{measure}_qkv"] = [v for matrix in "qkv" for v in report["weight"][matrix][measure]]
    for name, measures in report["circuit"].items():
        values |= {f"circuit_{measure}_{name}": blocks for measure, blocks in measures.items()}
    values = {key: torch.tensor([v for v in layers if v is not None]).double() for key, layers in values.items()}
    return {
        key: layers.log().mean().exp() if "condition" in key or "massive" in key else layers.mean()
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
