"""Metrics files: read back as written, no repeated steps after a resume, the same numbers in TensorBoard."""

from openmimo.core.metrics import MetricsWriter, read_metrics


def test_rows_survive_a_torn_line_and_truncation(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 5):
        writer.write(step, {"loss": step / 2})
    with open(writer.path, "a") as file:
        file.write('{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(writer.path)] == [1, 2, 3, 4]
    MetricsWriter(tmp_path).truncate_after(2)
    assert read_metrics(writer.path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_tensorboard_reads_the_scalars(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    for step in (1, 2):
        writer.write(step, {"loss/main": 3.0 / step, "stage": "text", "by_layer": [1, 2]})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert "loss/main" in tags["scalars"] + tags["tensors"]
    if "loss/main" in tags["scalars"]:
        assert [event.value for event in events.Scalars("loss/main")] == [3.0, 1.5]
    else:
        values = [float(event.tensor_proto.float_val[0]) for event in events.Tensors("loss/main")]
        assert values == [3.0, 1.5]
