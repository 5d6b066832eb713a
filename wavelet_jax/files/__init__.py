"""Files: reading what users name, and writing that is never seen half done."""
