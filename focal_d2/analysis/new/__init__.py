"""From a folder of images and annotations to a config: `focal-d2 new`."""
