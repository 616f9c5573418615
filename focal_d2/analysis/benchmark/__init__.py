"""Time and memory beside detectron2's RetinaNet."""
