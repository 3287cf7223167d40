"""The evaluation of the FuzzyTok paper (its Section 4), run again: one command a table, and a report beside the paper's figures."""
