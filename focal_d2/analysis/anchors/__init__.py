"""How anchors fit the boxes of a training set, and anchors that fit them better."""
