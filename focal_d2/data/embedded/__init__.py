"""Datasets that the package makes or cuts itself. Importing it registers them."""

from focal_d2.data.embedded import digits, neon_trees

digits.register()
neon_trees.register()
