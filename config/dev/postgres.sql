-- What the demo has in its databases. Access is by NOLOGIN groups that own nothing; leases are put into them.
-- Cut at the lines that name a database.

-- database shop
CREATE TABLE customers (id int PRIMARY KEY, name text NOT NULL);
CREATE TABLE invoices (id int PRIMARY KEY, customer int NOT NULL REFERENCES customers, cents int NOT NULL, paid boolean NOT NULL DEFAULT false);
INSERT INTO customers VALUES (1, 'First Customer'), (2, 'Second Customer');
INSERT INTO invoices VALUES (1, 1, 12900, true), (2, 2, 4900, false);
CREATE ROLE shop_invoices_read NOLOGIN;
CREATE ROLE shop_invoices_write NOLOGIN;
CREATE ROLE shop_customers_read NOLOGIN;
CREATE ROLE shop_customers_write NOLOGIN;
GRANT USAGE ON SCHEMA public TO shop_invoices_read, shop_invoices_write, shop_customers_read, shop_customers_write;
GRANT SELECT ON invoices TO shop_invoices_read;
GRANT SELECT, INSERT, UPDATE ON invoices TO shop_invoices_write;
GRANT SELECT ON customers TO shop_customers_read;
GRANT SELECT, INSERT, UPDATE ON customers TO shop_customers_write;

-- database sandbox
CREATE TABLE notes (id int PRIMARY KEY, body text NOT NULL);
INSERT INTO notes VALUES (1, 'nothing here is real');
CREATE ROLE sandbox_read NOLOGIN;
GRANT USAGE ON SCHEMA public TO sandbox_read;
GRANT SELECT ON notes TO sandbox_read;
