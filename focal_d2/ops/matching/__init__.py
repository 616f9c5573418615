"""Anchors and ground-truth boxes: which belongs to which."""
