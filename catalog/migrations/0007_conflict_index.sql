-- Records come in the order of id, which their time follows: a block range index finds a period, and costs writers nothing.
DROP INDEX duri.conflict_at;
CREATE INDEX conflict_at ON duri.conflict USING brin (at);
