"""Two small trained text-to-image pipelines, their pictures, and the reader that marks them."""
