"""Token mixers, skeletons and the models made of them, registered in timm."""
