"""Report: the records of a run described, as figures and as a page to browse."""
