"""The laws of the algebra, the cells and the layers, stated from the mathematics and drawn by hypothesis."""
