"""Checks of annotations: boxes, classes, and datasets against each other.

`run` calls the checks in `images`, `boxes`, `classes`, `limits` and `overlap`. `findings` is what they
return, `kinds` has the codes and what they mean.
"""
