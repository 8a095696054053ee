"""Tables of names that rename tensors in both directions, and join or split what one of two libraries keeps apart."""

import re
from collections.abc import Mapping, Sequence

import torch

Tensors = dict[str, torch.Tensor]
Table = Mapping[str, str | tuple[str, ...]]


class Names:
    """timm's names of tensors and the names of the same tensors in another library.

    In a name, `#` stands for a number, `#+1` for a number that is one higher in timm's name, and `*` for a word such as
    weight or bias.

    Args:
        table: {timm's name: the other name}. A tuple of other names means tensors of equal shape that are joined along
            their first axis in timm, such as query, key and value.
        spellings: further tables, with other names for some of timm's tensors. `to_timm` reads them, and `from_timm`
            does not write them.
    """

    def __init__(self, table: Table, *spellings: Table):
        self._out = [(_Pattern(ours), [_Pattern(their) for their in _parts(theirs)]) for ours, theirs in table.items()]
        self._into = [
            (_Pattern(their), _Pattern(ours), index, len(_parts(theirs)))
            for names in (table, *spellings)
            for ours, theirs in names.items()
            for index, their in enumerate(_parts(theirs))
        ]

    def to_timm(self, weights: Tensors) -> Tensors:
        """The tensors with timm's names. A tensor that is not in the tables keeps its name, and so do parts of which
        one is missing."""
        renamed, parts = {}, {}
        for name, tensor in weights.items():
            ours, index, count = self._ours(name)
            if count == 1:
                renamed[ours] = tensor
            else:
                parts.setdefault((ours, count), {})[index] = name
        for (ours, count), names in parts.items():
            if len(names) == count:
                renamed[ours] = torch.cat([weights[names[index]] for index in range(count)])
            else:
                renamed |= {name: weights[name] for name in names.values()}
        return renamed

    def from_timm(self, weights: Tensors) -> Tensors:
        """Copies of the tensors with the other names.

        Raises:
            ValueError: a tensor is not in the table.
        """
        renamed, unknown = {}, []
        for name, tensor in weights.items():
            found = [(words, theirs) for ours, theirs in self._out if (words := ours.read(name)) is not None]
            if not found:
                unknown.append(name)
                continue
            words, theirs = found[0]
            parts = tensor.chunk(len(theirs)) if len(theirs) > 1 else [tensor]
            renamed |= {their.write(words): part.clone() for their, part in zip(theirs, parts, strict=True)}
        if unknown:
            more = f", and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ValueError(f"it has no name for {min(unknown)}{more}")
        return renamed

    def _ours(self, name: str) -> tuple[str, int, int]:
        """timm's name, which of its parts `name` is, and the number of parts."""
        for their, ours, index, count in self._into:
            if (words := their.read(name)) is not None:
                return ours.write(words), index, count
        return name, 0, 1


MARKS = {"#": r"(\d+)", "#+1": r"(\d+)", "*": r"(\w+)"}


class _Pattern:
    """A name with marks."""

    def __init__(self, text: str):
        self.words = re.split(r"(#\+1|#|\*)", text)
        self.marks = [word for word in self.words if word in MARKS]
        self.regex = re.compile("".join(MARKS.get(word) or re.escape(word) for word in self.words))

    def read(self, name: str) -> list[str] | None:
        """The words at the marks, with the numbers of the other library; None if the name is another one."""
        found = self.regex.fullmatch(name)
        pairs = zip(self.marks, found.groups(), strict=True) if found else ()
        return [str(int(word) - 1) if mark == "#+1" else word for mark, word in pairs] if found else None

    def write(self, words: Sequence[str]) -> str:
        """The name with these words at the marks."""
        left = iter(words)
        texts = (next(left) if word in MARKS else word for word in self.words)
        return "".join(
            str(int(text) + 1) if word == "#+1" else text for word, text in zip(self.words, texts, strict=True)
        )


def _parts(theirs: str | tuple[str, ...]) -> tuple[str, ...]:
    return (theirs,) if isinstance(theirs, str) else theirs
