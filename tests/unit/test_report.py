"""Pages of runs: ticks that read as lengths and steps, and samples that cannot break the page."""

from openmimo.runtime.report import Report, length_axis, new_figure, step_axis


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
