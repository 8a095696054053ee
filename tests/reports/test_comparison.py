"""The table of analyze.py names the measures that not all configurations have."""

from reports.tables import comparison


def make_report(**summary):
    levels = {level: {} for level in ("embedding", "attention", "mlp", "weight", "circuit")}
    return levels | {"images": 8, "variance": [[1.0], [1.0]], "summary": summary}


def test_a_note_names_the_measures_that_some_configurations_lack():
    plain = make_report(attention_sink=0.5, circuit_abscosine_qk=0.25)
    text = comparison({"plain": [plain], "diff": [make_report(attention_sink=0.125)]}, ["a note"])
    table, notes, *_ = text.split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == ["attention sink, all blocks"]
    assert notes.splitlines() == [
        "- a note",
        "- not measured in diff, and so not in the table: absolute cosine of circuits, QK ↓",
    ]
    assert "not measured" not in comparison({"plain": [plain], "other": [plain]}, [])
