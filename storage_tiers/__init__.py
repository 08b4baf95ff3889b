"""Media that keep chunks: host memory, SSD, S3, and the seam (`base.Tier`) they share."""
