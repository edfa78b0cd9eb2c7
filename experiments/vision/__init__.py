"""Image sets as tasks: packages that carry them, a vision model rebuilt from a package, and the stages of the vision study."""
