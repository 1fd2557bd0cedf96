"""What `grade` is made of: reading, spelling and comparing final answers."""
