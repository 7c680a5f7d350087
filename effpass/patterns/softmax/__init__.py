"""What stands around a softmax: scores, masks and bounds, and the call of attention it becomes."""
