"""The evidence as a web page: one HTML file, and a board that follows runs and studies."""
