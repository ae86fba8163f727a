-- Inserts, an index, joins, aggregates, windows, text and JSON.
CREATE TABLE customers (id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE orders (id INTEGER PRIMARY KEY, customer INTEGER, amount REAL, note TEXT);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000)
INSERT INTO customers SELECT i, printf('customer %05x', i * 7919 % 65536), 'city ' || (i * 31 % 97) FROM n;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
INSERT INTO orders SELECT i, i * 7919 % 4000 + 1, (i * 104729 % 100003) / 7.0, hex(i * 2654435761) FROM n;
COMMIT;
CREATE INDEX by_customer ON orders (customer, amount);
SELECT city, count(*), round(sum(amount), 4), max(note) FROM orders JOIN customers ON customers.id = customer
  GROUP BY city ORDER BY sum(amount) DESC LIMIT 5;
SELECT name, total FROM (SELECT name, sum(amount) AS total, rank() OVER (ORDER BY sum(amount)) AS place
  FROM orders JOIN customers ON customers.id = customer GROUP BY name) WHERE place % 1000 = 1;
SELECT count(*) FROM orders WHERE note LIKE '%7A%' AND substr(note, 2, 1) IN ('1', '3', '5');
UPDATE orders SET amount = amount * 1.19, note = lower(note) WHERE customer % 3 = 0;
DELETE FROM orders WHERE id % 5 = 2;
SELECT count(*), round(total(amount), 3), round(avg(amount), 6), min(note) FROM orders;
SELECT json_group_array(json_object('c', customer, 'n', n)) FROM
  (SELECT customer, count(*) AS n FROM orders GROUP BY customer ORDER BY n DESC, customer LIMIT 8);
WITH RECURSIVE collatz(start, x, steps) AS
  (SELECT id, id, 0 FROM customers WHERE id <= 600
   UNION ALL SELECT start, iif(x % 2, 3 * x + 1, x / 2), steps + 1 FROM collatz WHERE x > 1)
SELECT start, max(steps) FROM collatz;
