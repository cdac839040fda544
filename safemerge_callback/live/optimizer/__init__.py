"""What an optimizer keeps of a factor: which kinds there are, how it is edited, copied, and follows a merge."""
