"""Commands, a module for each group. A command imports what it needs when it is called, so that help is quick."""
