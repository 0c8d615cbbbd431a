"""What is measured, how, and the results with their machine's name: see RESULTS.md."""
