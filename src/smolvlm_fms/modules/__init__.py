"""Tensors in, tensors out: the vision tower, the connector and the text backbone, built on ``fms.modules``."""
