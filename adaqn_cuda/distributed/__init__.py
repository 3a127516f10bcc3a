"""Parameters divided among processes: who has which rows, and which words are added up when."""
