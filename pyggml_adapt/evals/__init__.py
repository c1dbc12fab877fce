"""What measures how good a task is: programs over a host."""
