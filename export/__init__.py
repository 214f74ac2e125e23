"""Make a bundle: tower to ONNX, rules, verification, report."""
