"""Pages of runs: ticks that read as lengths and steps, and samples that cannot break the page."""

from openmimo.runtime.report import Report, length_axis, new_figure, step_axis
from openmimo.train.outcome import held_out_changes


def test_lengths_and_steps_are_plain_numbers():
    figure, (lengths, steps) = new_figure(columns=2)
    lengths.plot([64, 1024], [0, 1])
    length_axis(lengths, "tokens", [64, 256, 1024])
    steps.plot([0, 2], [0, 1])
    step_axis(steps, "step")
    figure.canvas.draw()
    assert [label.get_text() for label in lengths.get_xticklabels()] == ["64", "256", "1024"]
    assert all(float(tick).is_integer() for tick in steps.get_xticks())


def test_a_sample_is_text_of_the_page(tmp_path):
    report = Report("x")
    report.continuation("<a> & ", "</mark><script>")
    page = report.write(tmp_path / "page.html").read_text()
    assert "<pre>&lt;a&gt; &amp; <mark>&lt;/mark&gt;&lt;script&gt;</mark></pre>" in page


def test_the_first_and_last_held_out_values_are_named():
    rows = [
        {"step": 0, "validation/main": 6.0, "evaluation/words": 0.25, "evaluation/rewards": {"words": [0.25]}},
        {"step": 5, "loss/main": 3.0},
        {"step": 9, "validation/main": 2.0, "evaluation/words": 0.5, "evaluation_errors/words": 3.0},
    ]
    assert held_out_changes(rows) == [
        "held-out loss: 6.000 at step 0, 2.000 at step 9",
        "held-out reward of words: 0.250 at step 0, 0.500 at step 9",
    ]
    assert held_out_changes(rows[:2]) == []
