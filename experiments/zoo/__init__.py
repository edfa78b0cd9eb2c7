"""The made zoo: fine-tunes that go together, four that do harm, and how well each way to choose among them does."""
