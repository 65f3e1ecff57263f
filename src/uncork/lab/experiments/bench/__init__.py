"""What the loss costs: contenders, their correctness, time, memory and instructions; `uncork bench`."""
