"""Renders an evaluation as pictures, plots and HTML pages."""
