"""The function-level measures as a textbook writes them: one image at a time, changed copies of the model, loops."""

import copy
import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from unrolled import classified, embedded, patches, unrolled, vit_block

HEAD_FRACTIONS, TOKEN_FRACTIONS = [i / 10 for i in range(11)], [i / 10 for i in range(10)]


def textbook_function(name, model, backbone, test, train, seed=0):
    """What `measure_function` must return for images and labels ([n, 3, S, S], [n]), all at once."""
    model = copy.deepcopy(model).eval()
    values = {"test_images": len(test[1]), "train_images": len(train[1]), "seed": seed}
    values["accuracy"] = {"accuracy": accuracy(model, *test)}
    values["heads"] = heads(model, backbone, test, seed)
    values["blocks"] = {"skipped": [accuracy(without_block(model, i), *test) for i in range(len(backbone.all_blocks))]}
    values["tokens"] = None if "swin" in name else tokens(name, model, *test, seed)
    features = layer_features(name, model, train[0]), layer_features(name, model, test[0])
    values["knn"] = {"layers": by_layer(knn, features, train[1], test[1])}
    values["probe"] = {"layers": by_layer(probe, features, train[1], test[1])}
    values["patch_probe"] = patch_probe(name, model, backbone.grid, *test, seed)
    return values


def percent(hits):
    hits = [bool(hit) for hit in hits]
    return 100 * sum(hits) / len(hits)


def accuracy(model, images, labels):
    return percent(model(images).argmax(1) == labels)


def nearest(number):
    """The nearest integer, the upper one of two."""
    return math.floor(number + 0.5 + 1e-9)


# --- without heads and blocks


def all_blocks(model):
    return [block for stage in getattr(model, "layers", [model]) for block in stage.blocks]


@torch.no_grad()
def without_heads(model, removed):
    """A copy whose proj reads nothing of the heads (block, head)."""
    model = copy.deepcopy(model)
    for block, head in removed:
        attn = all_blocks(model)[block].attn
        size = attn.proj.in_features // attn.num_heads
        attn.proj.weight[:, head * size : (head + 1) * size] = 0
    return model


class Nothing(nn.Module):
    def forward(self, x, *args, **kwargs):
        return x


def without_block(model, i):
    model = copy.deepcopy(model)
    for stage in getattr(model, "layers", [model]):
        if i < len(stage.blocks):
            stage.blocks[i] = Nothing()
            return model
        i -= len(stage.blocks)
    raise IndexError


def heads(model, backbone, test, seed):
    places = [(i, h) for i, block in enumerate(backbone.all_blocks) for h in range(block.attn.num_heads)]
    even, odd = ((test[0][start::2], test[1][start::2]) for start in (0, 1))
    losses = {place: F.cross_entropy(without_heads(model, [place])(even[0]), even[1]).item() for place in places}
    complete = F.cross_entropy(model(even[0]), even[1]).item()
    generator = torch.Generator().manual_seed(seed)
    orders = [sorted(places, key=lambda place: losses[place])]
    orders += [[places[i] for i in torch.randperm(len(places), generator=generator)] for _ in range(3)]
    removed = [nearest(fraction * len(places)) for fraction in HEAD_FRACTIONS]
    curves = [[accuracy(without_heads(model, order[:number]), *odd) for number in removed] for order in orders]
    importance = [
        [losses[i, h] - complete for h in range(block.attn.num_heads)] for i, block in enumerate(backbone.all_blocks)
    ]
    return {
        "fractions": HEAD_FRACTIONS,
        "removed": removed,
        "least_important": curves[0],
        "random": [sum(curve[point] for curve in curves[1:]) / 3 for point in range(len(removed))],
        "random_orders": curves[1:],
        "importance": importance,
    }


# --- without tokens


def tokens(name, model, images, labels, seed):
    middle = len(model.blocks) // 2
    curves = {key: [] for key in ("random", "most_similar", "least_attended")}
    for number in range(len(images)):
        image = images[number : number + 1]
        x, context = embedded(name, model, image)
        for block in model.blocks[:middle]:
            x, maps = vit_block(block, x, **context)
        prefix = x.shape[1] - patches(name, x).shape[1]
        attention = maps[0].mean(dim=0)
        received = attention[0] if model.cls_token is not None else attention.mean(dim=0)
        orders = {
            "random": np.random.default_rng((seed, number)).permutation(x.shape[1] - prefix).tolist(),
            "most_similar": farthest_first([*F.normalize(patches(name, x)[0], dim=-1)]),
            "least_attended": sorted(range(x.shape[1] - prefix), key=lambda i: -received[prefix + i]),
        }
        for key, order in orders.items():
            hits = []
            for fraction in TOKEN_FRACTIONS:
                kept = sorted(order[: max(1, len(order) - nearest(fraction * len(order)))])
                y = x[:, [*range(prefix), *(prefix + i for i in kept)]]
                some = {"rope": context["rope"][kept]} if "rope" in context else context
                for block in model.blocks[middle:]:
                    y, _ = vit_block(block, y, **some)
                hits.append(classified(name, model, y)[0].argmax(1).item() == labels[number])
            curves[key].append(hits)
    curves = {key: [percent(point) for point in zip(*hits, strict=True)] for key, hits in curves.items()}
    return {"fractions": TOKEN_FRACTIONS, "block": middle} | curves


def farthest_first(unit):
    mean = sum(unit) / len(unit)
    order = [min(range(len(unit)), key=lambda i: unit[i] @ mean)]
    while len(order) < len(unit):
        left = [i for i in range(len(unit)) if i not in order]
        order.append(min(left, key=lambda i: max(unit[i] @ unit[j] for j in order)))
    return order


# --- k-NN and probes


def layer_features(name, model, images):
    """[n, D] for each layer, or None."""
    depth = len(all_blocks(model))
    classifies_token = getattr(model, "global_pool", "") == "token"
    if "swin" in name:
        x, outputs = model.patch_embed(images), []
        for stage in model.layers:
            x = stage.downsample(x)
            for block in stage.blocks:
                outputs.append(x := block(x))
        first = model.patch_embed(images)
    else:
        first = embedded(name, model, images)[0]
        outputs, x = [], first
        context = embedded(name, model, images)[1]
        for block in model.blocks:
            x, _ = vit_block(block, x, **context)
            outputs.append(x)
    layers = []
    for x in [first, *outputs][:depth]:
        pooled = x[:, 0] if classifies_token else patches(name, x).mean(dim=1)
        centred = pooled - pooled.mean(dim=1, keepdim=True)
        layers.append(centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt())
    if classifies_token:
        layers[0] = None
    return [*layers, model.forward_head(model.norm(outputs[-1]), pre_logits=True)]


def by_layer(read, features, bank_labels, labels):
    return [
        None if bank is None else percent(read(bank, bank_labels, queries) == labels)
        for bank, queries in zip(*features, strict=True)
    ]


def knn(bank, labels, queries):
    predicted = []
    for query in queries:
        votes = votes_of(query, bank, labels)
        predicted.append(max(votes, key=votes.get))
    return torch.tensor(predicted)


def votes_of(query, bank, labels):
    """{label: its votes} of the 20 images of a bank that are nearest to a query."""
    cosines = [(F.cosine_similarity(query, one, dim=0).item(), i) for i, one in enumerate(bank)]
    votes = dict.fromkeys(labels.tolist(), 0.0)
    for cosine, i in sorted(cosines, reverse=True)[:20]:
        votes[labels[i].item()] += math.exp(cosine / 0.07)
    return votes


def ridge(features, labels, classes):
    """The map [D, C] and the constants [C] by least squares on centred rows and, below them, rows of the penalty."""
    targets = F.one_hot(labels, classes).double()
    centred, wanted = features - features.mean(dim=0), targets - targets.mean(dim=0)
    variance = centred.square().mean()
    penalty = (0.01 * variance * len(features)).sqrt() * torch.eye(features.shape[1], dtype=torch.float64)
    rows = torch.cat((centred, penalty))
    weights = torch.linalg.lstsq(rows, torch.cat((wanted, torch.zeros(len(penalty), classes)))).solution
    return weights, targets.mean(dim=0) - features.mean(dim=0) @ weights


def probe(bank, labels, queries):
    weights, constants = ridge(bank, labels, 5)
    return (queries @ weights + constants).argmax(dim=1)


# --- patches


def patch_probe(name, model, grid, images, labels, seed):
    rows, columns = grid
    sides = images.shape[2] // rows, images.shape[3] // columns
    halves = {0: [], 1: []}
    for pair in range(len(images) // 2):
        generator = np.random.default_rng((seed, pair))
        height = int(generator.integers(1, max(2, rows)))
        top = int(generator.integers(0, rows - height + 1))
        width = int(generator.integers(1, max(2, columns)))
        left = int(generator.integers(0, columns - width + 1))
        for own, other in ((2 * pair, 2 * pair + 1), (2 * pair + 1, 2 * pair)):
            image, of_patches = images[own].clone(), []
            for row in range(rows):
                for column in range(columns):
                    is_pasted = top <= row < top + height and left <= column < left + width
                    if is_pasted:
                        y, x = (slice(i * side, (i + 1) * side) for i, side in zip((row, column), sides, strict=True))
                        image[:, y, x] = images[other][:, y, x]
                    of_patches.append((labels[other if is_pasted else own].item(), is_pasted))
            taps = unrolled(name, model, image[None])
            of_image = taps["logits"].argmax().item()
            halves[pair % 2] += [(tokens_of(name, model, taps)[0], taps["patch_logits"][0], of_image, of_patches)]
    fit = torch.cat([features for features, *_ in halves[0]])
    weights, constants = ridge(fit, torch.tensor([label for *_, of in halves[0] for label, _ in of]), 5)
    right, pasted, head, image, image_pasted, majority, all_labels = [], [], [], [], [], [], []
    for features, logits, of_image, of_patches in halves[1]:
        own = [label for label, _ in of_patches]
        most = max(set(own), key=own.count)
        for token, logit, (label, is_pasted) in zip(features, logits, of_patches, strict=True):
            right.append((token @ weights + constants).argmax().item() == label)
            pasted += [right[-1]] if is_pasted else []
            image.append(of_image == label)
            image_pasted += [image[-1]] if is_pasted else []
            head.append(logit.argmax().item() == label)
            majority.append(label == most)
            all_labels.append(label)
    chance = 100 * max(all_labels.count(label) for label in all_labels) / len(all_labels)
    values = {"all": right, "pasted": pasted, "head": head, "majority": majority}
    values |= {"image": image, "image_pasted": image_pasted}
    return {key: percent(hits) for key, hits in values.items()} | {"chance": chance, "patches": len(right)}


def tokens_of(name, model, taps):
    normed = patches(name, model.norm(taps["tokens"]))
    return normed if "swin" in name else model.fc_norm(normed)
