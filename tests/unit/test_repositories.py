"""Documents made of whole folders, and the measure of far dependencies."""

from openmimo.data.config import SourceConfig
from openmimo.data.source import read_documents
from openmimo.data.sources.repositories import far_share


def documents(path, **options) -> list[str]:
    return list(read_documents(SourceConfig("repositories", options={"path": str(path), **options})))


def test_a_folder_is_one_document_with_the_paths_of_its_files(tmp_path):
    (tmp_path / "alpha" / "inner").mkdir(parents=True)
    (tmp_path / "alpha" / "one.py").write_text("first = 1\n")
    (tmp_path / "alpha" / "inner" / "two.md").write_text("second\n")
    (tmp_path / "alpha" / "picture.png").write_bytes(b"\xff\xfe")
    (tmp_path / "beta").mkdir()
    (tmp_path / "beta" / "three.c").write_text("int third;\n")
    (tmp_path / "alone.txt").write_text("alone")
    assert documents(tmp_path) == [
        "alone",
        "# alpha/inner/two.md\nsecond\n\n# alpha/one.py\nfirst = 1\n",
        "# beta/three.c\nint third;\n",
    ]
    assert documents(tmp_path, min_characters=20) == documents(tmp_path)[1:]


def test_far_share_counts_words_whose_last_occurrence_is_far():
    words = [f"word{number}" for number in range(10)]
    text = " ".join(words + words[:5] + words[:1])  # the last one is five words after its second occurrence
    assert far_share(text, 10) == 5 / 16
    assert far_share(text, 5) == 6 / 16
    assert far_share(text, 11) == 0.0
    assert far_share("", 1) == 0.0


def test_documents_with_far_dependencies_are_repeated(tmp_path):
    (tmp_path / "far.txt").write_text(" ".join([f"word{number}" for number in range(50)] * 2))
    (tmp_path / "near.txt").write_text(" ".join(["word"] * 100))
    found = documents(tmp_path, copies=3, far_words=40)
    assert [len(text.split()) for text in found] == [100] * 4
    assert len(set(found[:3])) == 1 and found[3] != found[0]
    assert len(documents(tmp_path, far_words=40)) == 2
