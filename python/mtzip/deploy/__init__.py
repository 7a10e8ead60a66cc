"""A zipped network on the device: ONNX, programs, all tasks on the same input."""
