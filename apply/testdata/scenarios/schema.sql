-- The tables of the catalogue, at every site. A file that needs others makes them itself.
CREATE TABLE t (id int PRIMARY KEY, v text, n int DEFAULT 0, u int UNIQUE, big text);
ALTER TABLE t ALTER big SET STORAGE EXTERNAL;  -- so that 8 kB are stored out of line, and not compressed
CREATE TABLE p (id int PRIMARY KEY);
CREATE TABLE c (id int PRIMARY KEY, pid int REFERENCES p);
