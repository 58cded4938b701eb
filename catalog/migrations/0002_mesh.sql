-- With more than two sites, what the transactions of a site had seen of third sites is needed at the start.
ALTER TABLE duri.applied ADD COLUMN seen_others jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN duri.applied.seen_others IS 'how far the last merged transaction''s site had applied third sites: site number -> position in that site''s journal';
