"""The demo: recurrent language models trained from the command line (``adaqn train``)."""
